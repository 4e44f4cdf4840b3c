"""Does a fresh policy decide by a log as the logged one did?"""
