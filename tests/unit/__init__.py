"""Does one class or function alone give the answer that was worked out by hand?"""
