"""The ops: one module each, autograd and torch.compile support around hstu_ext._C."""
