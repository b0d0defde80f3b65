"""What one actor holds and does alone: passes, gradients, optimizer.

Enter by: stage, model_part, learner, optimizer_state, precision, dtensors, measure.
"""
