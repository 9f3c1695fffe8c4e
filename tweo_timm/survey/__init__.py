"""What will a checkpoint survive, where does it break, and what is the smallest fix?"""
