// Runs an AOTInductor package with packed layers, without Python: LIBRARY PACKAGE INPUT COLUMNS OUTPUT.
// INPUT holds float32 rows of COLUMNS numbers, OUTPUT gets those of the first output.
#include <dlfcn.h>

#include <cstdlib>
#include <fstream>
#include <iostream>
#include <iterator>
#include <vector>

#include <ATen/ATen.h>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>

int main(int argc, char** argv) {
  if (argc != 6) return 2;
  if (dlopen(argv[1], RTLD_NOW | RTLD_GLOBAL) == nullptr) {  // registers estdgm::packed_linear
    std::cerr << dlerror() << "\n";
    return 3;
  }
  std::ifstream file(argv[3], std::ios::binary);
  std::vector<char> bytes{std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>()};
  const int64_t columns = std::atoll(argv[4]);
  const int64_t rows = static_cast<int64_t>(bytes.size() / sizeof(float)) / columns;
  at::Tensor x = at::from_blob(bytes.data(), {rows, columns}, at::kFloat).clone();

  torch::inductor::AOTIModelPackageLoader loader(argv[2]);
  at::Tensor y = loader.run({x}).at(0).contiguous();

  std::ofstream(argv[5], std::ios::binary)
      .write(static_cast<const char*>(y.data_ptr()), static_cast<std::streamsize>(y.nbytes()));
  return 0;
}
