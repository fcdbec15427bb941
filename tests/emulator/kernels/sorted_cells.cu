// The sort of samples whose cells are given: for test_sort.py.
#include "../../../kernels_cu/sort.cuh"

struct Given {
  const int *given;

  __device__ __forceinline__ int cell(int sample) const { return given[sample]; }
  __device__ __forceinline__ Record<float> record(int sample) const {
    return {sample, float(sample), float(given[sample]), 0.5f};
  }
};

__global__ void __launch_bounds__(SORTERS) count(const int *given, int samples, int *cells, int *starts) {
  count_samples(Given{given}, samples, cells, starts);
}

__global__ void __launch_bounds__(SORTERS)
write(const int *given, int cells, const int *cell_of, const int *starts, const int *order, Record<float> *records) {
  write_records(Given{given}, cells, cell_of, starts, order, records);
}
