"""Does a command do what it promises, from its words to its files, and refuse in one line what is wrong?"""
