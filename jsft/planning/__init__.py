"""What a run will need, from its config alone: memory, traffic, work, time, disk. Touches no device."""
