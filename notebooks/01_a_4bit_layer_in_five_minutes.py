# %% [markdown]
# # 1. A 4-bit layer in five minutes
#
# **What goes in, what is stored, what comes out?**

# %%
import picture
from material import FEED_FORWARD, encoder_tensor

W = encoder_tensor(FEED_FORWARD + ".weight")
list(W.shape)

# %%
figure, axes = picture.canvas()
axes.hist(W.flatten().numpy(), bins=100)
picture.show(figure, "A histogram of the weights of one layer: a bell around 0.")
