"""one step of one actor, from its program to its commit; and how an actor is built, saved and restored"""
