"""The tasks that recipes over several models and methods know, by name."""

from image_classification import ImageClassification
from language_modeling import LanguageModeling
from text_classification import TextClassification


TASKS = {
    "text_classification": TextClassification,
    "image_classification": ImageClassification,
    "language_modeling": LanguageModeling,
}
