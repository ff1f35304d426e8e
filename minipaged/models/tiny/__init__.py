"""The shipped model: a small LLaMA trained on the plays of Shakespeare.  See README.md here."""
