"""The parts that teach nothing about the method: command line, processes, files and logs."""
