"""The trainer itself: modules and their layouts, what crosses between them, stages as compiled programs, the schedule
and the host loop, the loss, the optimizer and the end of a step; what it all costs in memory and FLOPs.

Imports point down, to the models, and to nothing else of hetjax: no data, no files, no settings.
"""
