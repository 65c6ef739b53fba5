"""Kinds of tasks: what is learned, from which data, by which recipe, and how the benign model is made and measured."""

from backdoorlab.tasks.base import BaseTask, TaskSpec, kinds, load_task
from backdoorlab.tasks.classification import Task

__all__ = ["BaseTask", "Task", "TaskSpec", "kinds", "load_task"]
