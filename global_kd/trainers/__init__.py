"""The frameworks' own trainers with a teacher beside the student; one file a framework.

Each file imports its framework, so import the one you need:
``from global_kd.trainers.ultralytics import DistillationTrainer``.
"""
