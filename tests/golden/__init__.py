"""Are the pinned runs what they were?"""
