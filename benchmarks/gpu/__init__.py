"""The parts of benchmarks/gpu_report.py: tests, speed, trainings, exactness and deployment, and what they stand on."""
