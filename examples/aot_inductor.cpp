// Runs the package that aot_inductor.py has written: aot_inductor model.pt2
//
// g++ -std=c++20 aot_inductor.cpp $(python aot_inductor_flags.py) -o aot_inductor

#include <torch/csrc/inductor/aoti_package/model_package_loader.h>
#include <torch/torch.h>

#include <iostream>

int main(int, char** arguments) {
    c10::InferenceMode inference;
    torch::inductor::AOTIModelPackageLoader model(arguments[1]);
    std::vector<torch::Tensor> outputs = model.run({torch::ones({3, 16})});
    std::cout << outputs[0] << "\n";
}
