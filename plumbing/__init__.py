"""The parts that do not belong to the method: command line, processes, files and logs."""
