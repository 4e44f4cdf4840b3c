"""What a run shows: timelines, tables of events, pictures."""
