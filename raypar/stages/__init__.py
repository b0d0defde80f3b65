"""what one actor holds and does alone: passes, gradients, optimizer"""
