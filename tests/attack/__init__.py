"""Wrong input of every kind, made from what is declared: nothing of it may pass, and none may end in a traceback."""
