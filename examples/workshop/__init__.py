"""What the scripts beside it share: pictures to learn from, small detectors, training and scoring.

Scenes of digits and readers of COCO and VOC folders, detectors by name, a trainer that resumes,
COCO metrics, plots, options. Distillation itself is in the scripts.
"""
