"""Real weights and data that packages ship, as folders and files that a run reads; fetched on call, never kept here.

Imports point down, to the data's errors and to what writes Hugging Face folders; scripts stand above.
"""
