"""What a run is and what it writes: the experiment and the gin files that fill it in, commands' arguments, records,
metrics, evaluation, samples and checkpoints.

Imports point down, to the core, the data and the models; the Hugging Face folders, generation and the commands stand
above and import from here.
"""
