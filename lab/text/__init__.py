"""GLUE's tasks, generated sentence pairs, tables of sentences, and the use of a saved model."""
