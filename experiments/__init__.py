"""What the library is used for, in rooms. Imports point down this list only.

train, evaluate, compare, result_tables   commands: they parse, call and print; nobody imports them
benchmarks   commands that time steps, or count what they ask of devices
comparison   many runs: grid, replicas, results, statistics, report
run          one training: experiment, loop, checkpoints, folder
step         one step: state, method, devices, feeds, evaluation
config       what a user asks for: options, methods, the resolved recipe
models       networks as pure functions
data         data sets, in memory or streamed
system       files, command lines, signals, processes, memory
"""
