"""Is every nanosecond where it belongs: by hand, in every random run, and against what a machine measured?"""
