"""How others name the weights of a DeepLab: a module for each layout, by name in ``registry``."""
