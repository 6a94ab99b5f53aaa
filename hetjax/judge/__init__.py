"""The judge: an independent trainer on one device, and how far a trainer under layouts is from it.

Imports point down, to the core whose answers it judges and to the models. The reference shares nothing with the core
but the graph and the optimizer's transformations; the core never imports from here.
"""
