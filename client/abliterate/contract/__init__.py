"""What client and daemon share, and nothing else: recipe, configuration, states, paths, wire messages, errors.

Imports the standard library, msgspec and platformdirs only.
"""
