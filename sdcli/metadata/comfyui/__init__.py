"""The graphs that ComfyUI writes into images, read as data: nothing in them is run.

Start with `record`. A graph is followed from the node that saves the image back to the sampler that made it (`graph`),
and from there to the settings (`sampling`), the model (`models`), the prompts (`conditioning`, in the syntax that
`syntax` converts) and the size (`latents`). `values` computes texts and numbers; `reading` keeps what was taken over,
so that everything else is named. `workflow` turns the graph as the user interface draws it into that of the server.
"""
