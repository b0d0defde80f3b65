"""One step of one actor; how an actor is built, saved and restored.

Enter by: build, engine, step, actor_state, microbatch, faults, clock.
"""
