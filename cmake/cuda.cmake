# hstu_gpu and hstu_gpu_sm90 (gpu_libraries), object libraries of the GPU kernels: finds nvcc and CUTLASS and generates
# the cells of HSTU_EXT_SET into the build tree. Without nvcc (auto) or with HSTU_EXT_CUDA=off there are no such targets and the variables below stay empty.
set(HSTU_EXT_CUDA_VERSION "")
set(HSTU_EXT_BUILT_ARCHS "")
set(HSTU_EXT_BUILT_SET "")

if(NOT HSTU_EXT_CUDA MATCHES "^(auto|on|off)$")
  message(FATAL_ERROR "HSTU_EXT_CUDA must be auto, on or off, got ${HSTU_EXT_CUDA}")
endif()
if(HSTU_EXT_CUDA STREQUAL off)
  message(STATUS "hstu_ext: CPU kernels only (HSTU_EXT_CUDA=off)")
  return()
endif()

if(NOT CMAKE_CUDA_COMPILER AND NOT DEFINED ENV{CUDACXX})
  find_program(HSTU_EXT_NVCC nvcc HINTS ENV CUDA_HOME ENV CUDA_PATH PATHS /usr/local/cuda PATH_SUFFIXES bin)
  if(HSTU_EXT_NVCC)
    set(CMAKE_CUDA_COMPILER ${HSTU_EXT_NVCC})
  elseif(HSTU_EXT_CUDA STREQUAL auto)
    message(STATUS "hstu_ext: CPU kernels only, because nvcc was not found (PATH, CUDA_HOME, CUDACXX, /usr/local/cuda)")
    return()
  endif()
endif()

# The sm80 family: sm_80 code with its PTX, which every newer GPU can run; for the other architectures machine code alone.
# The sm90 family needs sm_90a: 90 asks for both families' machine code on Hopper, 90a for the sm90 family alone.
set(CMAKE_CUDA_ARCHITECTURES "")
set(families sm80)
foreach(arch IN LISTS HSTU_EXT_ARCHS)
  if(arch MATCHES "^90a?$")
    set(families sm80 sm90)
  endif()
  if(arch EQUAL 80)
    list(APPEND CMAKE_CUDA_ARCHITECTURES 80)
  elseif(NOT arch STREQUAL 90a)
    list(APPEND CMAKE_CUDA_ARCHITECTURES ${arch}-real)
  endif()
endforeach()
if(NOT CMAKE_CUDA_ARCHITECTURES)
  set(CMAKE_CUDA_ARCHITECTURES 90-real)
endif()
set(CMAKE_CUDA_RUNTIME_LIBRARY Static)
set(CMAKE_CUDA_STANDARD 17)
set(CMAKE_CUDA_STANDARD_REQUIRED ON)
set(CMAKE_CUDA_VISIBILITY_PRESET hidden)
enable_language(CUDA)
find_package(CUDAToolkit REQUIRED)

list(APPEND CMAKE_MODULE_PATH ${PROJECT_SOURCE_DIR}/third_party)
find_package(CUTLASS 4.2 MODULE)
if(NOT CUTLASS_FOUND)
  message(FATAL_ERROR "hstu_ext: nvcc was found and CUTLASS was not. Install nvidia-cutlass==4.2.0.0, give "
                      "-DCUTLASS_DIR=<CUTLASS source tree>, or build the CPU part alone with -DHSTU_EXT_CUDA=off")
endif()

set(codegen ${PROJECT_SOURCE_DIR}/tools/codegen)
file(GLOB codegen_templates ${codegen}/templates/*.in)
set_property(DIRECTORY APPEND PROPERTY CMAKE_CONFIGURE_DEPENDS ${codegen}/generate.py ${codegen}/manifest.toml
                                       ${codegen_templates})
execute_process(
  COMMAND ${Python_EXECUTABLE} ${codegen}/generate.py --set ${HSTU_EXT_SET} --families ${families}
          --out ${CMAKE_CURRENT_BINARY_DIR}/cells
  OUTPUT_VARIABLE cell_sources
  OUTPUT_STRIP_TRAILING_WHITESPACE COMMAND_ERROR_IS_FATAL ANY)
string(REPLACE "\n" ";" cell_sources "${cell_sources}")

list(LENGTH cell_sources cell_count)
math(EXPR cell_count "${cell_count} - 1")
set(sm90_sources ${cell_sources})
list(FILTER sm90_sources INCLUDE REGEX "_sm90_")
list(FILTER cell_sources EXCLUDE REGEX "_sm90_")

add_library(
  hstu_gpu OBJECT
  csrc/attention/cell_table.cpp ${cell_sources}
  csrc/jagged/cuda.cu csrc/norm/cuda.cu
  csrc/similarity/sm80/in_batch_fused.cu csrc/similarity/sm80/in_batch_records.cu
  csrc/similarity/sm80/in_batch_softmax.cu csrc/similarity/sm80/l2norm.cu csrc/similarity/sm80/sampled_softmax.cu
  csrc/similarity/sm80/sampled_sort.cu csrc/similarity/sm80/topk.cu)
target_compile_definitions(hstu_gpu INTERFACE HSTU_EXT_CUDA=1)
target_link_libraries(hstu_gpu PUBLIC CUDA::cudart_static)
set(gpu_libraries hstu_gpu)
if(sm90 IN_LIST families)
  add_library(hstu_gpu_sm90 OBJECT ${sm90_sources} csrc/similarity/sm90/topk_scan.cu)
  target_compile_definitions(hstu_gpu PRIVATE HSTU_EXT_SM90=1)
  set_target_properties(hstu_gpu_sm90 PROPERTIES CUDA_ARCHITECTURES 90a-real)
  list(APPEND gpu_libraries hstu_gpu_sm90)
endif()
if(CMAKE_CUDA_COMPILER_VERSION VERSION_GREATER_EQUAL 13)
  set(compress --compress-mode=size)
else()
  set(compress -Xfatbin=-compress-all)
endif()
foreach(library IN LISTS gpu_libraries)
  target_include_directories(${library} PRIVATE csrc ${CMAKE_CURRENT_BINARY_DIR}/include)
  target_link_libraries(${library} PRIVATE CUTLASS::CUTLASS)
  target_compile_options(${library} PRIVATE $<$<COMPILE_LANGUAGE:CUDA>:${compress}>)
endforeach()

set(HSTU_EXT_CUDA_VERSION ${CMAKE_CUDA_COMPILER_VERSION})
string(REPLACE ";" " " HSTU_EXT_BUILT_ARCHS "${HSTU_EXT_ARCHS}")
set(HSTU_EXT_BUILT_SET ${HSTU_EXT_SET})
message(STATUS "hstu_ext: ${cell_count} GPU kernels (set ${HSTU_EXT_SET}) for ${HSTU_EXT_BUILT_ARCHS}, CUTLASS "
               "${CUTLASS_VERSION}")
