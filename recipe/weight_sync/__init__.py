"""The policy's weights on their way from the training ranks to the engines, and the proof that they have arrived."""
