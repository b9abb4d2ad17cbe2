"""What does local self-attention cost next to a convolution, and which implementation should I use?"""
