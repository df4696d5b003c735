"""What may be turned without changing what is learned, and the settings with which a step costs least by the plan."""
