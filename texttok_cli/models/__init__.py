"""The models: TexTok and its parts."""
