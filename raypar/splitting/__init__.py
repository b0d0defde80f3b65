"""a user's model becomes the code of its stages"""
