// Device code that the SSD kernels share: the operand layouts and the four phases of one work item.
//
// A work item is one chunk of 64 channels of one head. The warps of a block compute, in this order,
//   quantize_x     x (K, 64) -> shared memory, in the operand order of the matrix instructions:
//                  Q(w . x) for the state; copy_x: x itself for FP16 Scan2;
//                  scaling "dynamic": after find_scales, which takes the scales from the maxima
//   state_product  Q(w . x)^T . B_q, the chunk state, in registers
//   (passing)      the state entering the chunk -> INT8 operand in shared memory
//   RowScan        y = INT8 Scan1 + FP16 Scan2 + D . x
//
// Operand order. A unit is what one warp feeds to matrix instructions with one 16-byte access per
// lane: 512 bytes, lane by lane, no bank conflict and no byte permutation after the producer. Lane
// (g, t) = (lane / 4, lane % 4) of m16n8k32 holds four consecutive contraction indices 4t .. 4t + 3
// of row (A) or column (B) g. The following index maps are free, because rows and columns of a
// product may come in any order as long as both operands agree:
//   channels   column g of column block j is channel 8 slot(g) + j, slot(g) = g / 2 + 4 (g % 2). A
//              lane then loads x in 16 bytes, and its results of column blocks 0..7 are again 16
//              consecutive bytes of y, four lanes side by side.
//   state      step q = 2Q + s contracts the words n = 64Q + 16t + 8s + {0..3} and {4..7}, so that
//              a lane reads rows of C in 16 bytes and the state in runs of 8.
// A unit holds one row block of A as {row g, row g + 8} x {k low, k high}, low first, or two column
// blocks of B, each with k low and k high side by side: what the instructions want in neighbouring
// registers.
//
// Integer results leave the accumulators without a conversion instruction: they start at kMagicInt,
// whose bits read as FP32 are 1.5 . 2^23, so the sum read as FP32 is 1.5 . 2^23 + sum, exactly, for
// |sum| <= 2^22 = 128 . 128 . 256.

#ifndef SSDI8_SSD_CUH_
#define SSDI8_SSD_CUH_

#include "carry.cuh"
#include "cumsum.cuh"
#include "fp16_scan.cuh"
#include "fp16_tables.cuh"
#include "launch.cuh"
#include "mma.cuh"
#include "operands.cuh"
#include "passing.cuh"
#include "prepare.cuh"
#include "quantize_x.cuh"
#include "rounding.cuh"
#include "row_scan.cuh"
#include "shape.cuh"
#include "state_product.cuh"
#include "tables.cuh"

#endif  // SSDI8_SSD_CUH_
