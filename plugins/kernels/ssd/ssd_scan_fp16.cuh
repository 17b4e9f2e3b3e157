// ssd_scan with scaling "none", for sequences: called by its launcher, which has checked all else.

#ifndef SSDI8_SSD_SCAN_FP16_CUH_
#define SSDI8_SSD_SCAN_FP16_CUH_

#include <cuda_runtime.h>
#include <stddef.h>

#include "../kernels.h"
#include "shape.cuh"

namespace ssdi8 {

cudaError_t launch_ssd_scan_fp16(const ssd::Shape& shape, const Ssdi8SsdScanParams& p,
                                 cudaStream_t stream);
size_t ssd_scan_fp16_workspace(const ssd::Shape& shape);

}  // namespace ssdi8

#endif  // SSDI8_SSD_SCAN_FP16_CUH_
