// The documents of the API as JSON Schema (2020-12, as OpenAPI 3.1 takes them). Internal to api/v1.
#pragma once

#include <string_view>

namespace bulkhead::api::v1 {

inline constexpr std::string_view schemas_text = R"json({
"Problem": {
  "type": "object", "description": "RFC 9457: why a request was not done, and what would help.",
  "required": ["type", "title", "status", "code", "detail"],
  "properties": {
    "type": {"type": "string", "description": "https://bulkhead.dev/problems/<code>"},
    "title": {"type": "string"},
    "status": {"type": "integer", "minimum": 400, "maximum": 599},
    "code": {"type": "string", "enum": ["invalid", "unauthorized", "forbidden", "not-found", "method", "conflict", "stale",
      "quota", "no-room", "too-large", "too-many", "unavailable", "internal"]},
    "detail": {"type": "string", "description": "One sentence."},
    "reasons": {"type": "array", "items": {"type": "string"}},
    "ways": {"type": "array", "items": {"type": "string"}, "description": "The nearest ways to yes."},
    "hint": {"type": "string", "description": "What to type or send next."}}},
"Whoami": {
  "type": "object", "required": ["user", "role"],
  "properties": {"user": {"type": "string"}, "role": {"$ref": "#/components/schemas/Role"}, "tenant": {"type": "string"}, "from": {"type": "string"}}},
"Role": {"type": "string", "enum": ["admin", "operator", "tenant", "auditor"]},
"Name": {"type": "string", "pattern": "^[a-z]([a-z0-9-]{0,61}[a-z0-9])?$", "description": "Fits a DNS label."},
"Quota": {
  "type": "object", "additionalProperties": false, "description": "At most this much at a time; a key that is absent is no limit.",
  "properties": {
    "leases": {"type": "integer", "minimum": 0, "maximum": 1000000, "description": "At once, waiting ones included."},
    "gpus": {"type": "integer", "minimum": 0, "maximum": 1000000, "description": "Whole ones: exclusive and passthrough."},
    "slices": {"type": "integer", "minimum": 0, "maximum": 1000000, "description": "MIG instances of any profile."},
    "profiles": {"type": "object", "maxProperties": 64, "propertyNames": {"minLength": 1, "maxLength": 32},
      "additionalProperties": {"type": "integer", "minimum": 0, "maximum": 1000000}, "description": "MIG instances by profile."},
    "shares": {"type": "integer", "minimum": 0, "maximum": 1000000},
    "memory": {"type": "integer", "minimum": 0, "maximum": 1152921504606846976, "description": "Bytes of GPU memory."},
    "watts": {"type": "integer", "minimum": 0, "maximum": 1000000000},
    "gpuSecondsMonth": {"type": "integer", "minimum": 0, "maximum": 1000000000000, "description": "Of a calendar month, UTC; a slice counts its part of the GPU."}}},
"TenantRequest": {
  "type": "object", "additionalProperties": false, "required": ["name"],
  "properties": {
    "name": {"$ref": "#/components/schemas/Name"},
    "weight": {"type": "integer", "minimum": 1, "maximum": 1000000, "default": 100},
    "quota": {"$ref": "#/components/schemas/Quota"},
    "suspended": {"type": "boolean", "default": false, "description": "Keeps what it has, gets nothing new."},
    "note": {"type": "string", "maxLength": 200}}},
"Tenant": {
  "type": "object", "required": ["name", "weight", "quota", "suspended", "created", "version", "held"],
  "properties": {
    "name": {"$ref": "#/components/schemas/Name"}, "weight": {"type": "integer"}, "quota": {"$ref": "#/components/schemas/Quota"},
    "suspended": {"type": "boolean"}, "note": {"type": "string"}, "created": {"type": "string", "format": "date-time"},
    "version": {"type": "integer"}, "held": {"$ref": "#/components/schemas/Held"}}},
"Held": {
  "type": "object", "description": "What the tenant holds now, in the units of its quota.",
  "required": ["leases", "gpus", "slices", "shares", "memory", "watts", "gpuSecondsMonth"],
  "properties": {"leases": {"type": "integer"}, "gpus": {"type": "integer"}, "slices": {"type": "integer"},
    "profiles": {"type": "object", "additionalProperties": {"type": "integer"}}, "shares": {"type": "integer"},
    "memory": {"type": "integer"}, "watts": {"type": "integer"}, "gpuSecondsMonth": {"type": "integer"}}},
"TokenRequest": {
  "type": "object", "additionalProperties": false, "required": ["user", "role"],
  "properties": {
    "user": {"type": "string", "minLength": 1, "maxLength": 100}, "role": {"$ref": "#/components/schemas/Role"},
    "tenant": {"$ref": "#/components/schemas/Name"},
    "ttlSeconds": {"type": "integer", "minimum": 60, "maximum": 315360000},
    "certificate": {"type": "string", "pattern": "^[0-9a-f]{64}$", "description": "SHA-256 of a client certificate; no secret is made."},
    "note": {"type": "string", "maxLength": 200}}},
"Token": {
  "type": "object", "required": ["id", "user", "role", "created"],
  "properties": {
    "id": {"type": "string"}, "user": {"type": "string"}, "role": {"$ref": "#/components/schemas/Role"}, "tenant": {"type": "string"},
    "note": {"type": "string"}, "created": {"type": "string", "format": "date-time"}, "expires": {"type": "string", "format": "date-time"},
    "revoked": {"type": "string", "format": "date-time"}, "certificate": {"type": "boolean"},
    "secret": {"type": "string", "description": "In the answer to its creation alone; never again."}}},
"LeaseRequest": {
  "type": "object", "additionalProperties": false, "required": ["class"],
  "properties": {
    "tenant": {"$ref": "#/components/schemas/Name"},
    "class": {"type": "string", "enum": ["mig", "share", "exclusive", "passthrough"]},
    "profile": {"type": "string", "maxLength": 32, "description": "Of class mig: 1g.10gb."},
    "memory": {"type": "integer", "minimum": 1, "maximum": 1125899906842624, "description": "Of class share: the cap in bytes."},
    "weight": {"type": "integer", "minimum": 1, "maximum": 1000, "description": "Of class share: thousandths of a GPU's time."},
    "count": {"type": "integer", "minimum": 1, "maximum": 64, "default": 1, "description": "All or none."},
    "topology": {"type": "string", "enum": ["any", "same-gpu", "same-numa", "same-node", "spread"], "default": "any"},
    "ttlSeconds": {"type": "integer", "minimum": 10, "maximum": 7776000, "default": 3600},
    "deadline": {"type": "string", "format": "date-time", "description": "Not granted by then: it fails."},
    "wait": {"type": "boolean", "default": false, "description": "Queue it when there is no room now."},
    "priority": {"type": "integer", "minimum": -100, "maximum": 100, "default": 0},
    "preemptible": {"type": "boolean", "default": false},
    "models": {"type": "array", "maxItems": 16, "items": {"type": "string", "maxLength": 100}},
    "label": {"type": "string", "maxLength": 100}}},
"Device": {
  "type": "object", "required": ["gpu", "gpuName", "device"],
  "properties": {
    "gpu": {"type": "string"}, "gpuName": {"type": "string"}, "pci": {"type": "string"},
    "device": {"type": "string", "description": "What CUDA_VISIBLE_DEVICES takes; empty until the lease is active."},
    "profile": {"type": "string"}, "start": {"type": "integer"}, "generation": {"type": "integer"}, "memory": {"type": "integer"},
    "weight": {"type": "integer"}, "numaNode": {"type": "integer"}, "cpus": {"type": "string"},
    "deviceNodes": {"type": "array", "items": {"type": "string"}}, "cdi": {"type": "string"}}},
"Lease": {
  "type": "object", "required": ["id", "tenant", "user", "class", "count", "state", "created", "devices", "environment", "guarantees", "version"],
  "properties": {
    "id": {"type": "integer"}, "tenant": {"type": "string"}, "user": {"type": "string"},
    "class": {"type": "string", "enum": ["mig", "share", "exclusive", "passthrough"]}, "profile": {"type": "string"},
    "memory": {"type": "integer"}, "weight": {"type": "integer"}, "count": {"type": "integer"}, "topology": {"type": "string"},
    "ttlSeconds": {"type": "integer"}, "deadline": {"type": "string", "format": "date-time"}, "wait": {"type": "boolean"},
    "priority": {"type": "integer"}, "preemptible": {"type": "boolean"}, "models": {"type": "array", "items": {"type": "string"}},
    "label": {"type": "string"},
    "state": {"type": "string", "enum": ["requested", "queued", "preparing", "active", "releasing", "ended", "failed"]},
    "reason": {"type": "string"}, "ways": {"type": "array", "items": {"type": "string"}},
    "created": {"type": "string", "format": "date-time"}, "activeSince": {"type": "string", "format": "date-time"},
    "expires": {"type": "string", "format": "date-time"}, "ended": {"type": "string", "format": "date-time"},
    "notice": {"type": "string", "format": "date-time", "description": "Will be ended then for one of higher priority."},
    "devices": {"type": "array", "items": {"$ref": "#/components/schemas/Device"}},
    "environment": {"type": "object", "additionalProperties": {"type": "string"}},
    "guarantees": {"type": "array", "items": {"type": "string"}, "description": "What the class promises, in words, and what it does not isolate."},
    "version": {"type": "integer"}}},
"RenewRequest": {
  "type": "object", "additionalProperties": false, "required": ["ttlSeconds"],
  "properties": {"ttlSeconds": {"type": "integer", "minimum": 10, "maximum": 7776000, "description": "From now; never shortens."}}},
"Gpu": {
  "type": "object", "required": ["gpu", "index", "name", "pool", "free", "leases"],
  "properties": {"gpu": {"type": "string"}, "index": {"type": "integer"}, "name": {"type": "string"}, "pool": {"type": "string"},
    "why": {"type": "string"}, "numaNode": {"type": "integer"}, "free": {"type": "number"}, "leases": {"type": "array", "items": {"type": "integer"}}}},
"Host": {
  "type": "object", "required": ["draining", "gpus"],
  "properties": {"draining": {"type": "boolean"}, "trouble": {"type": "string"}, "gpus": {"type": "array", "items": {"$ref": "#/components/schemas/Gpu"}}}},
"DrainRequest": {
  "type": "object", "additionalProperties": false, "required": ["draining"],
  "properties": {"draining": {"type": "boolean", "description": "Nothing new is granted; what is held stays."}}},
"Event": {
  "type": "object", "required": ["id", "at", "kind", "what", "verb"],
  "properties": {"id": {"type": "integer"}, "at": {"type": "string", "format": "date-time"}, "kind": {"type": "string"},
    "tenant": {"type": "string"}, "what": {"type": "string"}, "verb": {"type": "string"}, "lease": {"$ref": "#/components/schemas/Lease"}}},
"AuditLine": {
  "type": "object", "required": ["id", "at", "user", "verb", "what", "outcome", "hash"],
  "properties": {"id": {"type": "integer"}, "at": {"type": "string", "format": "date-time"}, "user": {"type": "string"}, "role": {"type": "string"},
    "tenant": {"type": "string"}, "from": {"type": "string"}, "verb": {"type": "string"}, "what": {"type": "string"},
    "outcome": {"type": "string"}, "detail": {}, "hash": {"type": "string"}}},
"AuditVerdict": {
  "type": "object", "required": ["lines", "whole"],
  "properties": {"lines": {"type": "integer"}, "whole": {"type": "boolean"}, "broken": {"type": "string"}}},
"Page": {
  "type": "object", "required": ["items"],
  "properties": {"items": {"type": "array"}, "next": {"type": "string", "description": "For ?after=; absent on the last page."}}}
})json";

}  // namespace bulkhead::api::v1
