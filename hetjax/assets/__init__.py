"""Real weights and data that packages ship, as folders and files that a run reads; fetched on call, never kept here."""
