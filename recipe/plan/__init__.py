"""What a run will take, before anything is launched: memory of every GPU and machine, disk, time and money."""
