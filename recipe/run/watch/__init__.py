"""A page on which a run, or several, are watched while they go on, and looked at afterwards. It only reads."""
