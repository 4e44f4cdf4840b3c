"""What a run leaves behind: events, timelines, pictures."""
