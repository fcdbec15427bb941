// CUDA's device language for g++ (C++17, x86-64): what a .cu needs to compile and run on the CPU.
//
// The threads of a block run as cooperative fibers, one at a time, so that nothing here needs to be thread-safe;
// see runtime/fibers.cpp for how they take turns. A kernel reaches this header through kernels_cu/platform.cuh.
//
// What a kernel must keep to:
//   - SMEM() and DYN_SMEM() in place of __shared__;
//   - no function-local `static` variables: on the CPU they would live on from launch to launch;
//   - no standard headers after this one (its macros would break them), and g++'s <math.h>, never <cmath> alone,
//     which leaves abs(-1.5f) to the integer function.
//
// Not emulated: weak memory ordering, blocks that wait for one another, wgmma, TMA, clusters, textures,
// the rounding inside tensor cores, fast-math accuracy, flushing of denormals.
#pragma once

#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <type_traits>
#include <utility>

#include "emulator_language.h"
#include "emulator_vector_types.h"
#include "emulator_runtime.h"
#include "emulator_float16.h"
#include "emulator_math.h"
#include "emulator_atomics.h"
#include "emulator_warp.h"
