"""How far a run scales, from plain numbers: no files, no torch.

interval.py   a number with its interval; repeats
points.py     what was measured
speedup.py    speed-up, efficiency, Amdahl's and Gustafson's serial fractions
steptime.py   the time of an update as a formula
priors.py     what is supposed of its coefficients before anything is measured
fit.py        fitting them (the only module that loads scipy.optimize)
predict.py    prediction, the knee, points that were left out
simulate.py   clusters that are not there
goodput.py    throughput × statistical efficiency; ranks over a run
study.py      all that a series tells, from one call
answer.py     and in sentences
"""
