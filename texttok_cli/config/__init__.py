"""The schema (recipe, constructor argument and checkpoint header at once) and the recipe loader. Free of torch."""
