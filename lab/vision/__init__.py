"""Generated pictures, instructions, data in LLaVA's format, the vision-language model, and its tokens' routes."""
