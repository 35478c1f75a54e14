"""Learn five tasks of handwritten digits, one after the other, and see that nothing is forgotten.

Use: python examples/digits.py [FOLDER]
"""

import sys

import partialhn as phn

folder = sys.argv[1] if len(sys.argv) > 1 else "digits-stream"
stream = phn.Stream("digits", tasks=5, input_size=16, freeze_depth=3, trunk_epochs=6,
                    epochs=4, folder=folder)

while len(stream.learned) < len(stream.tasks):
    print(stream.learn_next())

print(stream.accuracy_matrix.round(3).to_string(na_rep=""))
print(f"mean accuracy {stream.metrics.accuracy:.1%}, forgetting {stream.metrics.forgetting:.1%}")
stream.plot().savefig(f"{folder}/accuracy.png")
print(f"figure: {folder}/accuracy.png")
print(f"model:  {stream.save(f'{folder}/model')}")
