"""What compares and judges trainings: data, evaluation, statistics, reports. Only the command line imports it."""
