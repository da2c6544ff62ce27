"""Features of a training as passes: functions from the program of a step to a program."""
